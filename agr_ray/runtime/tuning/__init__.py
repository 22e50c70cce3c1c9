"""What `tune` is made of: a sweep and its records, its study, and what Ray Tune asks and tells."""
