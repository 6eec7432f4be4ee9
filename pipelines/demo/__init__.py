"""The embedded default: local services, a synthetic camera world, and the two-round demonstration."""
