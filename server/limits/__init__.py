"""What each API key may use, and what it has used."""
