"""From files to batches: images, sources, transforms, loaders."""
