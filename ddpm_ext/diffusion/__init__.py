"""The mathematics: tensors in, tensors out; torch and numpy only."""
