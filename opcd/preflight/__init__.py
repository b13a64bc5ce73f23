"""What is known before the money is spent."""
