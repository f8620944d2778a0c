"""What two rooms or more share; knows no room."""
