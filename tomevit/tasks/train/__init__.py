"""A model trained on images, with merging: `tomevit train`."""
