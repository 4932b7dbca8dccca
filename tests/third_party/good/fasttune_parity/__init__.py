"""sentence-parity: tags each word of a sentence as even or odd by its length."""
