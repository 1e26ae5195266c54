"""What the tests bring along: far ends, stand-ins, builders."""
