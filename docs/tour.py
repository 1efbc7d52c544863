# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tour
# What tomevit does, in a few minutes and without a network: with a small model that ships with it and reads
# handwritten digits of 8×8 pixels. All calls are the same for a large one, as in `tomevit.create("vit_b16",
# pretrained=True)`.
#
# This page is a notebook made from `docs/tour.py`, and was run when the page was built: {nb-download}`tour.ipynb`. It
# needs `pip install 'tomevit[plot]'`.

# %%
import matplotlib.pyplot as plt
import torch

import tomevit
from tomevit.tasks.demo import held_out

torch.set_grad_enabled(False)
torch.set_num_threads(1)  # so small a model gains nothing from more
model = tomevit.create("digits_p1.plain", pretrained=True)
model.card.full_name, model.card.licence, model.config.depth, model.config.num_tokens

# %% [markdown]
# ## Classify
# The preprocessing belongs to the weights. It takes PIL images or uint8 tensors, here of 360 digits that the model
# was not trained on.

# %%
images, labels = held_out()
preprocess = tomevit.transform(model)
logits = model(preprocess(images))
print("images ", tuple(images.shape), images.dtype)
print("logits ", tuple(logits.shape))
print("found  ", logits[:12].argmax(1).tolist())
print("right  ", labels[:12].tolist())

# %% [markdown]
# `tomevit.classify` does it for files, folders and images, and gives the classes their names.

# %%
for answer in tomevit.classify(model, images[:3], top=2):
    print(", ".join(f"{guess.name}: {guess.probability:.1%}" for guess in answer.top))

# %% [markdown]
# ## Merge
# r tokens merge in each block. It takes [several forms](choosing_r.md), and can be set at any time, or
# given to one call.

# %%
for r in (0, 8, 16, (8, -1.0), 0.25):
    mega = tomevit.flops(model.config, r) / 1e6
    print(f"r = {r!s:9} {mega:4.1f} MFLOPs, tokens {model.token_counts(r)}")

# %%
prepared = preprocess(images)
model.r = 8
found = model(prepared)
found_at_16 = model(prepared, r=16)
(found.argmax(1) == found_at_16.argmax(1)).sum().item()  # of 360

# %% [markdown]
# ## What it costs
# This model never saw a merged token while it was trained, and loses accuracy as r grows. A second one was trained
# with merging, at r = 16, and loses far less.

# %%
trained = tomevit.create("digits_p1.tome_r16", pretrained=True)
values = range(0, 25, 4)
ratios = [tomevit.flops(model.config) / tomevit.flops(model.config, r) for r in values]
figure, axis = plt.subplots(figsize=(6, 3.4))
for each, name in ((model, "off the shelf"), (trained, "trained with merging")):
    right = [(each(prepared, r=r).argmax(1) == labels).sum().item() for r in values]
    axis.plot(ratios, [100 * count / len(labels) for count in right], "o-", label=name)
axis.set_xlabel("times fewer FLOPs")
axis.set_ylabel("accuracy, %")
axis.legend()
plt.show()

# %% [markdown]
# ## Look inside
# `forward_intermediates` returns the tokens after every block. `slots` says where each initial token is now, so it
# tells which pixels became one. Pixels of one token share a colour here.

# %%
from tomevit.tasks.plots import draw_groups

some = [2, 0, 8, 10]
steps = trained.forward_intermediates(prepared[some])  # at r = 16, as it was trained
prefix, grid = trained.config.num_prefix, trained.config.grid
figure, axes = plt.subplots(len(some), 1 + len(steps), figsize=(6.4, 5.4))
for row, i in zip(axes, range(len(some)), strict=True):
    row[0].imshow(images[some[i], 0], cmap="gray")
    for axis, tokens in zip(row[1:], steps, strict=True):
        groups = tokens.slots[i, prefix:].view(grid)
        axis.imshow(draw_groups(images[some[i]], groups).permute(1, 2, 0))
for axis, title in zip(axes[0], ("image", "block 1", "block 2", "block 3", "block 4"), strict=True):
    axis.set_title(title, fontsize=10)
for axis in axes.flat:
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Back to the grid
# `forward_features` returns the tokens after the last block: here 9 of 65. Their sizes say how many initial tokens
# each stands for, and `unmerge` gives each pixel the vector of its token.

# %%
tokens = trained.forward_features(prepared[some])
print("tokens ", tuple(tokens.x.shape))
print("sizes  ", tokens.size[0].flatten().int().tolist())
print("pixels ", tuple(tomevit.unmerge(tokens)[:, prefix:].unflatten(1, grid).shape))

# %% [markdown]
# ## Keep it
# One file describes itself: architecture, preprocessing, licence, r.

# %%
trained.r = 12
tomevit.save(trained, "digits.safetensors")
again = tomevit.load("digits.safetensors")
again.card.full_name, again.r, torch.equal(again(prepared), trained(prepared))

# %% [markdown]
# ## Next
# [How merging works](merging.md), [images of your own](looking.md), [choosing r](choosing_r.md), [the
# models](zoo.md), [fine-tuning](finetuning.md).
