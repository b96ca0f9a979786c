"""Files to the Hugging Face Hub and back."""
