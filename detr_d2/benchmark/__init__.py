"""Measuring this package against its peers and the machine it runs on."""
