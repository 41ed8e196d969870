"""What clients may ask and how it is answered, whoever asks: a route or a row of a batch."""
