"""What a sweep is without Ray: search space, study, trial records, results."""
