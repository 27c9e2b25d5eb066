"""What sandbox sessions do, wherever they run: each kind inherits the classes of these modules."""
