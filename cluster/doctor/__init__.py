"""`fewstep doctor`: what would stop a job here, found before it starts."""
