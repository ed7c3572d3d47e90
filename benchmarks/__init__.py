"""What is measured of this code and of its methods."""
