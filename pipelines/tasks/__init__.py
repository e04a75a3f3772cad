"""Tasks: prompts with checks. `family` makes the embedded ones, `humaneval` and `files` load others."""
