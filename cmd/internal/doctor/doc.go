// Package doctor finds out why viasocks does not work on a host, or with a proxy, and says what to do about it.
//
//	report := doctor.Examine(ctx, doctor.Options{Config: cfg, Environ: env})
//	doctor.WriteText(os.Stdout, report)
//
// A check looks at one thing and gives a Finding for it. Checks run side by side, each has a limit, and the whole ends after
// Limit
// whatever hangs. No host is contacted but those that the user named: the proxies, the resolvers given by --dns, and through
// the proxy the --peer, where Serve runs. Requests that a proxy is to refuse are for a name and an address that belong to nobody
// (RFC 6761, RFC 3849).
package doctor
