"""The parts of a scoring run that do not depend on Ray: planning, grouping, scoring parts, publishing."""
