"""The inference engine: torch and transformers, without Ray. Start reading at `engine.py`."""
