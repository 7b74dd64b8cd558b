"""The five rebuilt systems, what they share (`systems.common`), and their registry."""
