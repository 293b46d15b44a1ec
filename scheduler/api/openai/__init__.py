"""OpenAI's doors: the wire of their API under ``/openai/v1``, answered by motet's jobs. docs/openai.md teaches them."""
