"""The toolkits that a build is made with."""
