"""Pictures of what was learnt and measured. Pure: arrays and rows in, images out."""
