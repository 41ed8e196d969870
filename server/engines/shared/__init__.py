"""What every engine does alike."""
