"""The effect handler: guides whose plates follow the model's."""
