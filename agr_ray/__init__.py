"""Train, tune, evaluate and run models of perceived age, gender and race from photographs of faces."""

__version__ = "0.1.0"
