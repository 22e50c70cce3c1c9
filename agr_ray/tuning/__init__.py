"""The parts of a sweep that do not depend on Ray: search space, study, trial records, results."""
