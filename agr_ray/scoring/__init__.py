"""What a scoring run does without Ray: planning, grouping, scoring parts, publishing."""
