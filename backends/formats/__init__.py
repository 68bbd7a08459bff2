"""Tables of scales as engines and other tools read and write them."""
