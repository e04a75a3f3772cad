"""The OpenAI wire format in front of an engine: what is read, what is answered, what is refused."""
