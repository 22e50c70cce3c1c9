"""How a set is divided for a cross-validation: one file for each protocol. Pure: tables in, folds out."""
