"""What `train` is made of: a run, the workers that make it, what they read and report."""
