"""The settings: their types and defaults, what goes together, and their composition by Hydra."""
