"""What comes in: images, labelled folders, shards, class names, and work shared between processes."""
