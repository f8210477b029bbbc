// Package doctor finds out why viasocks does not work on a host, or with a proxy, and says what to do about it.
//
//	report := doctor.Examine(ctx, doctor.Options{Config: cfg, Environ: env})
//	doctor.WriteText(os.Stdout, report)
//
// A check looks at one thing and gives a Finding for it. Checks run concurrently, and each has a time limit. The
// examination ends after Limit even if a check hangs. Only hosts that the user has named are contacted: the proxies,
// the resolvers of --dns and, through the proxy, the --peer, on which Serve runs. The requests that a proxy is expected
// to refuse are for a name and an address that belong to nobody (RFC 6761, RFC 3849).
package doctor
