"""What every part needs: the errors that users see, progress on the terminal, files that are written whole or not at all."""
