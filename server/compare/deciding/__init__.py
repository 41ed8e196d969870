"""What is chosen on held-back text before arms are measured: variants, fitted weights, matched samples."""
