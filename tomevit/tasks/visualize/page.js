(() => {
  const data = JSON.parse(byId("data").textContent);
  const [rows, columns] = data.grid;
  const edges = Uint8Array.from(atob(data.edges), (character) => character.charCodeAt(0)); // a colour for each patch
  const patches = rows * columns;
  const depth = data.runs[0].tokens.length - 1; // step 0 is the patch embedding, step i block i
  const runs = data.runs.map((run) => ({
    ...run,
    groups: words(run.groups), // (depth + 1) x patches: the token of each patch after each step
    attention: run.attention && words(run.attention), // depth x patches, in 1/65535 of `most`
    steps: [],
  }));
  const total = (run) => run.flops.reduce((sum, flops) => sum + flops, 0);
  const [unit, UNIT] = data.unmerged < 1e9 ? [1e6, "MFLOPs"] : [1e9, "GFLOPs"];
  const slow = matchMedia("(prefers-reduced-motion: reduce)");

  const state = {
    run: Math.max(0, runs.findIndex((run) => run.tokens[depth] < run.tokens[0])),
    step: depth,
    view: "groups",
    wipe: 0.5, // how much of the picture, from the left, is the image as it was
    hovered: -1, // patches, or -1
    cursor: -1, // where the keyboard is
    pinned: -1,
  };
  const base = byId("base").getContext("2d");
  const before = byId("before").getContext("2d");
  const mark = byId("mark").getContext("2d");
  const pixels = canvas(columns, rows).getContext("2d"); // a picture with a pixel for each patch
  const photo = new Image();
  let means; // patches x 3
  let cell = 1; // pixels along a patch on the large canvases

  function byId(id) {
    return document.getElementById(id);
  }

  function words(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => bytes[2 * i] | (bytes[2 * i + 1] << 8));
  }

  function canvas(width, height) {
    return Object.assign(document.createElement("canvas"), { width, height });
  }

  function element(name, attributes = {}, ...children) {
    const made = Object.assign(document.createElement(name), attributes);
    made.append(...children);
    return made;
  }

  function many(count, one) {
    return `${count} ${one}${count === 1 ? "" : one === "patch" ? "es" : "s"}`;
  }

  function percent(share) {
    return `${(100 * share).toPrecision(share < 0.0995 ? 2 : 3)}\u00a0%`;
  }

  // ---------------------------------------------------------------------------------------------------------- groups

  /** The tokens after a step: the token of each patch, -1 if dropped; the patches, the first one and the colour of each. */
  function tokensAfter(run, step) {
    return (run.steps[step] ??= (() => {
      const count = run.tokens[step] - data.prefix.length;
      const of = Int32Array.from(run.groups.subarray(step * patches, (step + 1) * patches), (token) => (token < count ? token : -1));
      const size = new Uint16Array(count);
      const first = new Int32Array(count).fill(-1);
      const colour = new Float32Array(3 * count);
      for (let patch = 0; patch < patches; patch++) {
        const token = of[patch];
        if (token < 0) continue;
        if (first[token] < 0) first[token] = patch;
        size[token]++;
        for (let c = 0; c < 3; c++) colour[3 * token + c] += means[3 * patch + c];
      }
      for (let i = 0; i < 3 * count; i++) colour[i] /= size[Math.floor(i / 3)];
      return { of, size, first, colour };
    })());
  }

  /** In the view of attention, the tokens that enter the block: those it is about. */
  function tokensShown(run = runs[state.run], step = state.step) {
    return tokensAfter(run, state.view === "attention" ? Math.max(0, step - 1) : step);
  }

  /** The class token's attention to a patch in a block, as a share of all. */
  function attended(run, step, patch) {
    return (run.attention[(step - 1) * patches + patch] / 65535) * run.most[step - 1];
  }

  /** A token keeps the colour of its first patch as it grows. */
  function edge(patch) {
    return `rgb(${edges.subarray(3 * patch, 3 * patch + 3).join(" ")})`;
  }

  /** What lies over a patch that has this level of attention: a sheet's colour, and how opaque it is. */
  function sheet(level) {
    const opacity = 1 - data.dim * (1 - level) - (1 - data.lit) * level;
    return [data.light.map((light) => (light * data.lit * level) / opacity), opacity];
  }

  // --------------------------------------------------------------------------------------------------------- drawing

  /** What a run looks like after a step, a pixel for each patch. */
  function miniature(context, run, step) {
    const image = context.createImageData(columns, rows);
    const { of, colour } = tokensAfter(run, step);
    for (let patch = 0; patch < patches; patch++) {
      for (let c = 0; c < 3; c++) {
        const own = means[3 * patch + c];
        image.data[4 * patch + c] = state.view === "image" ? own : of[patch] < 0 ? 0.3 * own : colour[3 * of[patch] + c];
      }
      image.data[4 * patch + 3] = 255;
      if (state.view === "attention") {
        const [colour, opacity] = step > 0 ? sheet(run.attention[(step - 1) * patches + patch] / 65535) : [[0, 0, 0], 0];
        for (let c = 0; c < 3; c++) {
          image.data[4 * patch + c] = means[3 * patch + c] * (1 - opacity) + colour[c] * opacity;
        }
      }
    }
    context.putImageData(image, 0, 0);
  }

  /** Lines inside the edges of tokens, in the colour that `style` gives a token. */
  function outline(context, cell, tokens, style, width) {
    const of = tokens.of;
    for (let row = 0, patch = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++, patch++) {
        const token = of[patch];
        const colour = style(token);
        if (colour === null) continue;
        context.fillStyle = colour;
        const w = width(token);
        const differs = (down, across) => {
          const r = row + down;
          const c = column + across;
          return r < 0 || c < 0 || r >= rows || c >= columns || of[r * columns + c] !== token;
        };
        const x = column * cell;
        const y = row * cell;
        const up = differs(-1, 0);
        const below = differs(1, 0);
        const left = differs(0, -1);
        const right = differs(0, 1);
        if (up) context.fillRect(x, y, cell, w);
        if (below) context.fillRect(x, y + cell - w, cell, w);
        if (left) context.fillRect(x, y, w, cell);
        if (right) context.fillRect(x + cell - w, y, w, cell);
        if (!up && !left && differs(-1, -1)) context.fillRect(x, y, w, w);
        if (!up && !right && differs(-1, 1)) context.fillRect(x + cell - w, y, w, w);
        if (!below && !left && differs(1, -1)) context.fillRect(x, y + cell - w, w, w);
        if (!below && !right && differs(1, 1)) context.fillRect(x + cell - w, y + cell - w, w, w);
      }
    }
  }

  /** Bright diagonals over the patches that are dropped. */
  function hatch(context, cell, tokens) {
    const apart = Math.max(4, Math.floor(cell / 3));
    context.save();
    context.beginPath();
    for (let patch = 0; patch < patches; patch++) {
      if (tokens.of[patch] < 0) context.rect((patch % columns) * cell, Math.floor(patch / columns) * cell, cell, cell);
    }
    context.clip();
    context.beginPath();
    for (let x = apart; x < (columns + rows) * cell; x += apart) {
      context.moveTo(x, 0);
      context.lineTo(x - rows * cell, rows * cell);
    }
    context.strokeStyle = "rgb(255 255 255 / 0.35)";
    context.lineWidth = Math.max(1, Math.floor(cell / 14));
    context.stroke();
    context.restore();
  }

  /** The image, in `cell` pixels to a patch. */
  function drawImage(context, cell) {
    context.imageSmoothingEnabled = photo.naturalHeight > 4 * rows;
    context.imageSmoothingQuality = "high";
    context.drawImage(photo, 0, 0, columns * cell, rows * cell);
  }

  /** What is shown of a step, in `cell` pixels to a patch. */
  function drawStep(context, cell, step) {
    const run = runs[state.run];
    const tokens = tokensShown(run, step);
    const merged = (colour) => (token) => (token >= 0 && tokens.size[token] > 1 ? colour(token) : null);
    if (state.view === "groups") {
      context.imageSmoothingEnabled = false;
      miniature(pixels, run, step);
      context.drawImage(pixels.canvas, 0, 0, columns * cell, rows * cell);
      const line = Math.max(1, Math.round(0.1 * cell));
      outline(context, cell, tokens, merged((token) => edge(tokens.first[token])), () => line);
      hatch(context, cell, tokens);
      return;
    }
    drawImage(context, cell);
    if (state.view === "attention" && step > 0) {
      const image = pixels.createImageData(columns, rows);
      for (let patch = 0; patch < patches; patch++) {
        const [colour, opacity] = sheet(run.attention[(step - 1) * patches + patch] / 65535);
        image.data.set([...colour, 255 * opacity], 4 * patch);
      }
      pixels.putImageData(image, 0, 0);
      context.imageSmoothingEnabled = false;
      context.drawImage(pixels.canvas, 0, 0, columns * cell, rows * cell);
      outline(context, cell, tokens, merged(() => "rgb(255 255 255 / 0.3)"), () => Math.max(1, Math.round(0.025 * cell)));
      hatch(context, cell, tokens);
    }
  }

  function drawBase() {
    drawStep(base, cell, state.step);
  }

  function selected() {
    return state.hovered >= 0 ? state.hovered : state.cursor >= 0 ? state.cursor : state.pinned;
  }

  /** All but the selected token in shade. */
  function drawMark() {
    const { width, height } = mark.canvas;
    mark.clearRect(0, 0, width, height);
    const patch = selected();
    if (patch < 0) return;
    const tokens = tokensShown();
    const chosen = tokens.of[patch];
    mark.fillStyle = "rgb(0 0 0 / 0.45)";
    mark.fillRect(0, 0, width, height);
    for (let other = 0; other < patches; other++) {
      if (tokens.of[other] === chosen) {
        mark.clearRect((other % columns) * cell, Math.floor(other / columns) * cell, cell, cell);
      }
    }
    const line = Math.max(2, Math.round(0.1 * cell));
    outline(mark, cell, tokens, (token) => (token === chosen ? "#fff" : null), () => line);
    for (const at of new Set([state.pinned, state.cursor])) {
      if (at >= 0) square(at, Math.max(2, Math.round(0.08 * cell)));
    }
  }

  /** The patch that is kept, or where the keyboard is. */
  function square(patch, line) {
    const inset = Math.round(0.22 * cell);
    const side = cell - 2 * inset;
    const x = (patch % columns) * cell + inset;
    const y = Math.floor(patch / columns) * cell + inset;
    mark.lineWidth = 2 * line;
    mark.strokeStyle = "#000";
    mark.strokeRect(x, y, side, side);
    mark.lineWidth = line;
    mark.strokeStyle = "#fff";
    mark.strokeRect(x, y, side, side);
  }

  // -------------------------------------------------------------------------------------------------------- in words

  function place(step) {
    return step === 0 ? "before block 1" : `${step} of ${depth}`;
  }

  function describe(patch) {
    const run = runs[state.run];
    const tokens = tokensShown();
    const size = tokens.size[tokens.of[patch]];
    const where = `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
    const own = size === 1 ? "a token of its own" : `in a token of ${size} patches, ${percent(size / patches)} of all`;
    const group = tokens.of[patch] < 0 ? "dropped, in no token" : own;
    const parts = [`Patch in ${where}`, `${group}${state.pinned === patch ? "; kept" : ""}`];
    const entering = tokensAfter(run, Math.max(0, state.step - 1));
    if (run.attention && state.step > 0 && entering.of[patch] >= 0) {
      const share = attended(run, state.step, patch);
      const whole = share * entering.size[entering.of[patch]];
      parts.push(
        whole > 1.0001 * share
          ? `The class token gives it ${percent(share)} of its attention in block ${state.step}, and its token ${percent(whole)}`
          : `The class token gives it ${percent(share)} of its attention in block ${state.step}`,
      );
    }
    return parts;
  }

  function writeReadout(aloud = false) {
    const patch = selected();
    const readout = byId("readout");
    if (patch < 0) {
      const { of, size } = tokensShown();
      const dropped = of.reduce((count, token) => count + (token < 0), 0);
      const front = data.prefix.length > 2 ? [`${data.prefix.length} that never merge`] : data.prefix.map((name) => `the ${name} token`);
      const largest = Math.max(...size);
      readout.replaceChildren(
        `${many(size.length + data.prefix.length, "token")}${state.view === "attention" && state.step > 0 ? " that enter" : ""}: ${[...front, `${size.length} for ${many(patches - dropped, "patch")}`].join(", ")}` +
          (largest === 1 ? "" : `, the largest for ${largest}`) +
          (dropped ? `; ${many(dropped, "patch")} dropped.` : ".") +
          (largest === 1 ? "" : " Point at one."),
      );
    } else {
      const [where, group, attention] = describe(patch);
      readout.replaceChildren(element("b", {}, where), `: ${group}.`, attention ? ` ${attention}.` : "");
    }
    byId("mark").setAttribute("aria-label", readout.textContent);
    clearTimeout(writeReadout.timer);
    if (aloud) {
      writeReadout.timer = setTimeout(() => (byId("live").textContent = readout.textContent), 200);
    }
  }

  function writeLegend() {
    const legend = byId("legend");
    const run = runs[state.run];
    if (state.view === "image") {
      legend.replaceChildren(`What the model sees: resized and cropped to ${data.size[1]} × ${data.size[0]} pixels.`);
    } else if (state.view === "groups") {
      legend.replaceChildren(
        "Patches of one token share its mean colour and an edge. Those without an edge are a token each." +
          (run.dropped[depth] ? " Dark, hatched patches are dropped: no token stands for them." : ""),
      );
    } else if (state.step === 0) {
      legend.replaceChildren("There is no attention before block 1.");
    } else {
      const shares = data.prefix.map((name, i) => `${percent(run.prefix[state.step - 1][i])} to the ${name} token`);
      const most = `${percent(run.most[state.step - 1])} a patch`;
      legend.replaceChildren(
        element("div", { className: "scale" }, "0", scale, most),
        `Attention of the class token in block ${state.step}, mean of the heads, over the tokens that enter; a token's ` +
          `share is divided among its patches. ${shares.join(", ")}.${data.reads}` +
          (run.dropped[depth] ? " Hatched patches are dropped before." : ""),
      );
    }
  }

  const scale = (() => {
    const bar = canvas(128, 1);
    const context = bar.getContext("2d");
    const image = context.createImageData(128, 1);
    for (let i = 0; i < 128; i++) {
      const [colour, opacity] = sheet(i / 127);
      image.data.set([...colour.map((value) => value * opacity + 160 * (1 - opacity)), 255], 4 * i);
    }
    context.putImageData(image, 0, 0);
    return bar;
  })();

  function writeAnswers() {
    const run = runs[state.run];
    byId("answers-card").hidden = run.answers.length === 0;
    byId("answers-title").textContent = `Prediction at r = ${run.r}`;
    byId("answers").replaceChildren(
      ...run.answers.map(([name, probability]) => {
        const bar = element("b");
        bar.style.width = `${100 * probability}%`;
        return element("li", {}, element("span", {}, name), element("span", {}, percent(probability)), element("i", {}, bar));
      }),
    );
  }

  function writeTable() {
    if (!byId("figures").open) return;
    const run = runs[state.run];
    const dropped = run.dropped[depth] > 0;
    const heads = ["block", "tokens", "largest", ...(dropped ? ["patches dropped"] : []), UNIT, ...(run.attention ? ["attention to the prefix"] : [])];
    const lines = run.tokens.map((tokens, step) => [
      step === 0 ? "embedding" : step,
      tokens,
      Math.max(...tokensAfter(run, step).size),
      ...(dropped ? [run.dropped[step]] : []),
      (run.flops[step] / unit).toPrecision(3),
      ...(run.attention ? [step === 0 ? "" : percent(run.prefix[step - 1].reduce((sum, share) => sum + share, 0))] : []),
    ]);
    byId("table").replaceChildren(
      element("caption", { className: "hidden" }, `r = ${run.r}`),
      element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
      element(
        "tbody",
        {},
        ...lines.map((line, step) =>
          element("tr", { className: step === state.step ? "here" : "" }, ...line.map((value) => element("td", {}, String(value)))),
        ),
      ),
    );
  }

  // ---------------------------------------------------------------------------------------------------------- charts

  const WIDTH = 400;
  const HEIGHT = 130;
  const LEFT = 46;
  const TOP = 14;
  const BOTTOM = 22;

  function shape(name, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  /** Lines over the blocks, one for each run; returns what marks a run and a step. */
  function chart(svg, lines, from, written, name) {
    const highest = Math.max(...lines.flat());
    const x = (step) => LEFT + (step / depth) * (WIDTH - LEFT - 12);
    const y = (value) => TOP + (1 - value / highest) * (HEIGHT - TOP - BOTTOM);
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    for (const share of [0, 0.5, 1]) {
      const at = y(share * highest);
      svg.append(shape("line", { class: "grid", x1: LEFT, x2: WIDTH - 12, y1: at, y2: at }));
      svg.append(shape("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, written(share * highest)));
    }
    const apart = Math.ceil(depth / 6);
    for (let step = 0; step <= depth; step += apart) {
      svg.append(shape("text", { x: x(step), y: HEIGHT - 5, "text-anchor": "middle" }, step));
    }
    const drawn = lines.map((line) =>
      shape("polyline", { points: line.map((value, i) => `${x(from + i)},${y(value)}`).join(" ") }),
    );
    const now = shape("line", { class: "now", y1: TOP, y2: HEIGHT - BOTTOM });
    const dot = shape("circle", { r: 5 });
    const value = shape("text", { class: "value", "text-anchor": "middle" });
    svg.append(...drawn, now, dot, value);
    svg.addEventListener("pointerdown", (event) => {
      const box = svg.getBoundingClientRect();
      const across = ((event.clientX - box.left) / box.width) * WIDTH;
      const step = Math.round(((across - LEFT) / (WIDTH - LEFT - 12)) * depth);
      goTo(Math.min(depth, Math.max(0, step)));
    });
    let front = -1;
    return (run, step) => {
      if (run !== front) {
        front = run;
        drawn.forEach((line, i) => line.classList.toggle("here", i === run));
        svg.insertBefore(drawn[run], now); // in front of the others
        const line = lines[run];
        svg.setAttribute(
          "aria-label",
          `${name} at r = ${data.runs[run].r}: ${written(line[0])} first, ${written(line[line.length - 1])} last`,
        );
      }
      const shown = step >= from;
      for (const part of [now, dot, value]) part.style.display = shown ? "" : "none";
      if (!shown) return;
      const at = lines[run][step - from];
      for (const key of ["x1", "x2"]) now.setAttribute(key, x(step));
      dot.setAttribute("cx", x(step));
      dot.setAttribute("cy", y(at));
      value.setAttribute("x", Math.min(WIDTH - 30, Math.max(LEFT + 20, x(step))));
      value.setAttribute("y", y(at) < TOP + 16 ? y(at) + 20 : y(at) - 10);
      value.textContent = written(at);
    };
  }

  // ---------------------------------------------------------------------------------------------------------- changes

  const strip = Array.from({ length: depth + 1 }, (_, step) => {
    const thumb = canvas(columns, rows);
    thumb.addEventListener("click", () => goTo(step));
    return thumb;
  });
  let cards = [];
  let charts = [];

  /** Everything that follows from the state; `changed` says what of it is new. */
  function show(changed) {
    const run = runs[state.run];
    if ("run" in changed || "view" in changed) {
      strip.forEach((thumb, step) => miniature(thumb.getContext("2d"), run, step));
    }
    if ("run" in changed) writeAnswers();
    if ("view" in changed) {
      for (const part of document.querySelectorAll("#before, #wipe, .tag")) part.hidden = state.view === "image";
    }
    if ("step" in changed) {
      const slider = byId("step");
      slider.value = state.step;
      strip.forEach((thumb, step) => thumb.classList.toggle("here", step === state.step));
      const [box, at] = [byId("strip"), strip[state.step]];
      if (box.scrollWidth > box.clientWidth) {
        box.scrollLeft = at.offsetLeft - box.offsetLeft - (box.clientWidth - at.offsetWidth) / 2;
      }
    }
    const left = state.view === "attention" && state.step > 0 ? " after it" : "";
    const text = `${place(state.step)}, ${many(run.tokens[state.step], "token")}${left}`;
    byId("step").setAttribute("aria-valuetext", state.step === 0 ? text : `block ${text}`);
    byId("step-text").textContent = text;
    cards.forEach((card, i) => miniature(card, runs[i], state.step));
    charts.forEach((moveTo) => moveTo(state.run, state.step));
    drawBase();
    drawMark();
    writeReadout();
    writeLegend();
    writeTable();
  }

  function change(changed) {
    const before = { ...state };
    Object.assign(state, changed);
    for (const key of Object.keys(changed)) if (before[key] === state[key]) delete changed[key];
    if (Object.keys(changed).length > 0) show(changed);
  }

  function goTo(step) {
    play(false);
    change({ step });
  }

  function point(changed, aloud = false) {
    const before = selected();
    const pinned = state.pinned;
    const cursor = state.cursor;
    Object.assign(state, changed);
    if (selected() === before && pinned === state.pinned && cursor === state.cursor) return;
    drawMark();
    writeReadout(aloud);
  }

  function patchAt(event) {
    const box = mark.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return row < 0 || column < 0 || row >= rows || column >= columns ? -1 : row * columns + column;
  }

  function onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const at = state.cursor >= 0 ? state.cursor : Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    const row = Math.floor(at / columns);
    const column = at % columns;
    const moves = {
      ArrowLeft: () => row * columns + Math.max(0, column - 1),
      ArrowRight: () => row * columns + Math.min(columns - 1, column + 1),
      ArrowUp: () => Math.max(0, row - 1) * columns + column,
      ArrowDown: () => Math.min(rows - 1, row + 1) * columns + column,
      Home: () => row * columns,
      End: () => row * columns + columns - 1,
    };
    if (event.key in moves) {
      point({ cursor: moves[event.key](), hovered: -1 }, true);
    } else if (event.key === "PageUp" || event.key === "PageDown") {
      const step = state.step + (event.key === "PageDown" ? 1 : -1);
      goTo(Math.min(depth, Math.max(0, step)));
      writeReadout(true);
    } else if (event.key === "Enter" || event.key === " ") {
      point({ pinned: state.pinned === at ? -1 : at, hovered: -1 }, true);
    } else if (event.key === "Escape") {
      point({ pinned: -1, hovered: -1 }, true);
    } else {
      return;
    }
    event.preventDefault();
  }

  function play(on) {
    clearInterval(play.timer);
    play.on = on;
    byId("play").setAttribute("aria-label", on ? "Stop" : "Play through the blocks");
    byId("play-shape").setAttribute("d", on ? "M3 2h4v12H3zM9 2h4v12H9z" : "M4 2l10 6-10 6z");
    if (!on) return;
    if (state.step === depth) change({ step: 0 });
    play.timer = setInterval(
      () => {
        change({ step: state.step + 1 });
        if (state.step === depth) play(false);
      },
      slow.matches ? 1500 : Math.max(200, 5000 / depth),
    );
  }

  function playOnceSeen() {
    const seen = new IntersectionObserver(
      (entries) => {
        if (!entries.some((entry) => entry.isIntersecting)) return;
        seen.disconnect();
        play(true);
      },
      { threshold: 0.5 },
    );
    seen.observe(byId("stage"));
  }

  function resize() {
    const width = byId("stage").clientWidth * (window.devicePixelRatio || 1);
    const fits = Math.max(1, Math.round(width / columns));
    if (fits === cell && mark.canvas.width === cell * columns) return;
    cell = fits;
    for (const { canvas: large } of [base, before, mark]) Object.assign(large, { width: cell * columns, height: cell * rows });
    drawImage(before, cell);
    drawBase();
    drawMark();
  }

  // ------------------------------------------------------------------------------------------------- before and after

  function wipeTo(share) {
    state.wipe = Math.min(1, Math.max(0, share));
    byId("stage").style.setProperty("--wipe", `${100 * state.wipe}%`);
    byId("wipe").setAttribute("aria-valuenow", Math.round(100 * state.wipe));
    byId("wipe").setAttribute("aria-valuetext", `${Math.round(100 * state.wipe)} % of the picture`);
  }

  function startWipe() {
    const wipe = byId("wipe");
    wipe.addEventListener("pointerdown", (event) => wipe.setPointerCapture(event.pointerId));
    wipe.addEventListener("pointermove", (event) => {
      if (!wipe.hasPointerCapture(event.pointerId)) return;
      const box = byId("stage").getBoundingClientRect();
      wipeTo((event.clientX - box.left) / box.width);
    });
    wipe.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const steps = { ArrowLeft: -0.05, ArrowDown: -0.05, ArrowRight: 0.05, ArrowUp: 0.05, Home: -1, End: 1 };
      if (!(event.key in steps)) return;
      wipeTo(state.wipe + steps[event.key]);
      event.preventDefault();
    });
    wipeTo(state.wipe);
  }

  // ----------------------------------------------------------------------------------------------------------- saving

  /** A step as it is seen, with what it is below, on a canvas of its own; `longest` is its longer edge, about. */
  function poster(step, longest) {
    const cell = Math.max(1, Math.round(longest / Math.max(rows, columns)));
    const [width, height] = [cell * columns, cell * rows];
    const size = Math.max(12, Math.round(width / 32));
    const context = canvas(width, height + Math.round(3.6 * size)).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff";
    context.fillRect(0, 0, context.canvas.width, context.canvas.height);
    drawStep(context, cell, step);
    if (state.view !== "image") {
      const at = Math.round(state.wipe * width);
      context.save();
      context.beginPath();
      context.rect(0, 0, at, height);
      context.clip();
      drawImage(context, cell);
      context.restore();
      context.fillStyle = "#fff";
      if (at > 0 && at < width) context.fillRect(at - 1, 0, Math.max(2, Math.round(width / 300)), height);
    }
    const run = runs[state.run];
    const best = run.answers[0];
    const count = `${run.tokens[step]} of ${many(run.tokens[0], "token")}`;
    const lines = [
      `r = ${run.r}, ${step === 0 ? "before block 1" : `block ${step} of ${depth}`}: ${count}`,
      `${[...new Set([document.title, data.name])].join(" in ")}${best ? `: ${best[0]}, ${percent(best[1])}` : ""}`,
    ];
    lines.forEach((line, i) => {
      context.font = `${i === 0 ? 600 : 400} ${size}px system-ui, sans-serif`;
      context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--saved-ink");
      let shown = line;
      while (context.measureText(shown).width > width - size) shown = `${shown.slice(0, -2)}…`;
      context.fillText(shown, size / 2, height + (1.45 + 1.4 * i) * size);
    });
    return context;
  }

  function save(blob, kind) {
    const link = element("a", { href: URL.createObjectURL(blob) });
    const stem = `${document.title.replace(/\.\w+$/, "")}-r${runs[state.run].r}`;
    link.download = `${stem.replace(/[^\p{L}\p{N}._-]+/gu, "_").slice(0, 80)}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function savePng() {
    poster(state.step, 1024).canvas.toBlob((blob) => save(blob, "png"));
  }

  async function saveGif() {
    const button = byId("save-gif");
    button.disabled = true;
    await new Promise((drawn) => setTimeout(drawn, 50)); // until the button says so
    const posters = Array.from({ length: depth + 1 }, (_, step) => poster(step, 512));
    const { width, height } = posters[0].canvas;
    const frames = posters.map((context) => context.getImageData(0, 0, width, height).data);
    const delays = frames.map((_, step) => (step === depth ? 2500 : Math.min(400, 6000 / depth)));
    save(encodeGif(frames, delays, width, height), "gif");
    button.disabled = false;
  }

  function isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function nameTheme() {
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
  }

  // ------------------------------------------------------------------------------------------------------------ start

  function measure() {
    const whole = canvas(photo.naturalWidth, photo.naturalHeight);
    const context = whole.getContext("2d", { willReadFrequently: true });
    context.drawImage(photo, 0, 0);
    const image = context.getImageData(0, 0, whole.width, whole.height);
    const [down, across] = [whole.height / rows, whole.width / columns];
    means = new Float32Array(3 * patches);
    for (let i = 0; i < whole.width * whole.height; i++) {
      const row = Math.floor(Math.floor(i / whole.width) / down);
      const patch = row * columns + Math.floor((i % whole.width) / across);
      for (let c = 0; c < 3; c++) {
        means[3 * patch + c] += image.data[4 * i + c] / (down * across);
      }
    }
  }

  function start() {
    measure();
    document.documentElement.style.setProperty("--ratio", columns / rows);
    byId("setting").textContent = data.setting;
    byId("notes").textContent = data.notes;
    byId("step").max = depth;
    byId("strip").replaceChildren(...strip);

    const most = data.unmerged;
    cards = runs.map((run, i) => {
      const small = canvas(columns, rows);
      const cost = total(run);
      const written = `${(cost / unit).toPrecision(3)} ${UNIT}`;
      const best = run.answers[0];
      const input = element("input", { type: "radio", name: "run", checked: i === state.run });
      input.addEventListener("change", () => change({ run: i }));
      const words = element(
        "span",
        {},
        element("span", { className: "name" }, element("span", {}, `r = ${run.r}`), best ? element("span", {}, `${best[0]} (${percent(best[1])})`) : ""),
        element("span", { className: "quiet" }, `${run.tokens[depth]} of ${many(run.tokens[0], "token")} remain${run.dropped[depth] ? `, ${many(run.dropped[depth], "patch")} dropped` : ""}`),
        run.plain ? element("span", { className: "quiet" }, `here r = ${run.plain}`) : "",
        element("span", { className: "quiet" }, cost === most ? written : `${written}, ${(most / cost).toFixed(2)} times fewer`),
      );
      byId("runs").append(element("label", { className: "run" }, input, element("span", {}, small, words)));
      return small.getContext("2d");
    });
    const whole = (value) => String(Math.round(value));
    const costs = (value) => (value === 0 ? "0" : value.toPrecision(3));
    byId("chart-flops-title").textContent = `${UNIT} of each block`;
    charts = [
      chart(byId("chart-tokens"), runs.map((run) => run.tokens), 0, whole, "Tokens after each block"),
      chart(byId("chart-flops"), runs.map((run) => run.flops.slice(1).map((flops) => flops / unit)), 1, costs, `${UNIT} of each block`),
    ];

    for (const input of document.querySelectorAll("input[name=view]")) {
      if (input.value === "attention" && !runs[0].attention) input.parentElement.remove();
      input.checked = input.value === state.view; // browsers remember what was chosen before a reload
      input.addEventListener("change", () => change({ view: input.value }));
    }
    byId("step").addEventListener("input", (event) => goTo(Number(event.target.value)));
    byId("play").addEventListener("click", () => play(!play.on));
    byId("figures").addEventListener("toggle", writeTable);
    byId("theme").addEventListener("click", () => {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      nameTheme();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);

    const picture = mark.canvas;
    picture.addEventListener("pointermove", (event) => point({ hovered: patchAt(event) }));
    picture.addEventListener("pointerleave", () => point({ hovered: -1 }));
    picture.addEventListener("click", (event) => {
      const patch = patchAt(event);
      if (patch >= 0) point({ pinned: state.pinned === patch ? -1 : patch });
    });
    picture.addEventListener("keydown", onKey);
    picture.addEventListener("focus", () => {
      if (picture.matches(":focus-visible")) {
        point({ cursor: state.pinned >= 0 ? state.pinned : Math.floor(rows / 2) * columns + Math.floor(columns / 2) }, true);
      }
    });
    picture.addEventListener("blur", () => point({ cursor: -1 }));
    startWipe();
    byId("save-png").addEventListener("click", savePng);
    byId("save-gif").addEventListener("click", saveGif);
    new ResizeObserver(resize).observe(byId("stage"));

    nameTheme();
    play(false);
    resize();
    show(state);
    document.documentElement.dataset.ready = "yes";
    if (!slow.matches) playOnceSeen();
  }

  photo.onload = start;
  photo.src = data.image;
})();
