"""The bundled small model and the recipe that trains it."""
