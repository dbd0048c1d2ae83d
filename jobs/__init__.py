"""The submitted jobs, one file per verb, and the `engine` command."""
