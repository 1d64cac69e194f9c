"""Model families: data, verbs and named pipelines, one family a file."""
