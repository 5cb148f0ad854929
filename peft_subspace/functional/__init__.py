"""Pure tensor mathematics: torch and tensorly only, no `nn.Module`, no PEFT."""
