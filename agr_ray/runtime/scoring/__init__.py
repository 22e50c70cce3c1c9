"""What `score` is made of: the plan of a run, its workers, and the tables that it publishes."""
