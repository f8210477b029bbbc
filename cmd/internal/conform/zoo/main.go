// Command zoo runs the two ends of a probe, and makes the manual's tables from what was found: see scripts/zoo.sh.
//
//	zoo far FIRST SECOND [MORE…]                   the far end, on port 7000
//	zoo probe URL NAME VERSION                     a probe of the server; the far end's addresses are those of zoo.sh
//	zoo survey OLD FILE…                           puts what several probes printed into a survey, in place of older entries
//	zoo serve ADDRESS DIRECTORY                    a web server
//	zoo echo N INTERVAL [UNSENDABLE EVERY]         N datagrams to the far end, and others that the server cannot send
//	zoo resolve URL NAME                           has a Tor resolve a name
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/conform"
	"github.com/viasocks/viasocks/socks"
)

const farPort = 7000

// The addresses that zoo.sh gives to its namespaces.
var ends = conform.Ends{
	TCP:         netip.MustParseAddrPort("198.51.100.2:7000"),
	TCP6:        netip.MustParseAddrPort("[2001:db8:2::2]:7000"),
	Name:        "far.example",
	Refused:     netip.MustParseAddrPort("198.51.100.2:9"),
	Unreachable: netip.MustParseAddrPort("192.0.2.1:7000"),
	Silent:      netip.MustParseAddrPort("192.0.2.2:7000"),
	Unsendable: map[string]netip.AddrPort{
		"no route":      netip.MustParseAddrPort("192.0.2.3:7000"),
		"no IPv6 route": netip.MustParseAddrPort("[2001:db8:ffff::1]:7000"),
	},
	UDP: [2][2]netip.AddrPort{
		{netip.MustParseAddrPort("198.51.100.2:7000"), netip.MustParseAddrPort("198.51.100.2:7001")},
		{netip.MustParseAddrPort("198.51.100.3:7000"), netip.MustParseAddrPort("198.51.100.3:7001")},
	},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "zoo:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("usage: zoo far FIRST SECOND [MORE…] | probe URL NAME VERSION | survey OLD FILE… | " +
	"serve ADDRESS DIRECTORY | echo N INTERVAL [UNSENDABLE EVERY] | resolve URL NAME")

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) >= 3 && args[0] == "far":
		return far(ctx, args[1:])
	case len(args) == 4 && args[0] == "probe":
		return probe(ctx, args[1], args[2], args[3])
	case len(args) >= 3 && args[0] == "survey":
		return survey(args[1], args[2:])
	case len(args) == 3 && args[0] == "serve":
		return serve(ctx, args[1], args[2])
	case (len(args) == 3 || len(args) == 5) && args[0] == "echo":
		return echoes(ctx, args[1:])
	case len(args) == 3 && args[0] == "resolve":
		return resolve(ctx, args[1], args[2])
	}
	return errUsage
}

func far(ctx context.Context, args []string) error {
	var at []netip.Addr
	for _, s := range args {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return err
		}
		at = append(at, a)
	}
	f, err := conform.ListenFar(farPort, at[0], at[1], at[2:]...)
	if err != nil {
		return err
	}
	<-ctx.Done()
	return f.Close()
}

// probe prints the report for people to standard error, and an entry of a survey to standard output.
func probe(ctx context.Context, url, name, version string) error {
	server, err := socks.ParseServer(url)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()
	r, err := conform.Probe(ctx, conform.Config{Server: server, Ends: ends})
	if err != nil {
		return fmt.Errorf("cannot finish the probe of %s: %w", name, err)
	}
	fmt.Fprintf(os.Stderr, "\n%s %s\n", name, version)
	if err := r.WriteText(os.Stderr); err != nil {
		return err
	}
	if !r.Reachable || !r.Open.Works {
		return fmt.Errorf("%s carries nothing: its entry would say nothing about it", name)
	}
	return write(conform.Entry{Name: name, Version: version, Report: r})
}

func echoes(ctx context.Context, args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	interval, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	var p poison
	if len(args) > 2 {
		if p.to, err = netip.ParseAddrPort(args[2]); err != nil {
			return err
		}
		if p.every, err = time.ParseDuration(args[3]); err != nil {
			return err
		}
	}
	return echo(ctx, ends.UDP[0][0], n, interval, p)
}

func survey(old string, files []string) error {
	var s conform.Survey
	if err := read(old, &s); err != nil {
		return err
	}
	for _, name := range files {
		var e conform.Entry
		if err := read(name, &e); err != nil {
			return err
		}
		s.Put(e)
	}
	return write(s)
}

func read(name string, v any) error {
	b, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return fmt.Errorf("cannot read %s: %w", name, err)
	}
	return nil
}

func write(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "\t")
	return e.Encode(v)
}
