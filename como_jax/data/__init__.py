"""From datasets on disk to sharded batches: schema, sources, transforms, pipeline."""
