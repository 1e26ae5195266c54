"""What the tests bring along: stand-ins and fixtures that several test modules share."""
