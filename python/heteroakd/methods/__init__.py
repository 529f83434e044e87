"""What a student is trained with."""
