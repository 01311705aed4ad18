"""The gRPC plumbing every service stands on: settings, server, conversion, clients."""
