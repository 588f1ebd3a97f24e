"""Functions of POT and geomloss under their signatures, so that code that calls them changes one import line."""
