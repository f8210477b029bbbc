package config

import (
	"slices"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/route"
)

const (
	// defaultSniffPorts are those of HTTP and TLS.
	defaultSniffPorts = "80,443"
	// maxSniffPorts limits the work for each connection.
	maxSniffPorts = 64
)

func setSniff(c *Config, v value) error {
	switch v.text {
	case "off", "rules", "name":
		c.SniffMode = v.text
		return nil
	}
	return v.err("must be off, rules or name")
}

func setSniffPorts(c *Config, v value) error {
	c.SniffPorts = nil
	for s := range strings.SplitSeq(v.text, ",") {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 {
			return v.err("%q is not a port from 1 to 65535", s)
		}
		if n == 53 {
			return v.err("port 53 is always viasocks': names are asked through the proxy")
		}
		if !slices.Contains(c.SniffPorts, uint16(n)) {
			c.SniffPorts = append(c.SniffPorts, uint16(n))
		}
	}
	if len(c.SniffPorts) > maxSniffPorts {
		return v.err("more than %d ports", maxSniffPorts)
	}
	return nil
}

// checkSniff refuses combinations in which what the program says would decide what is allowed.
func (c *Config) checkSniff() error {
	if c.Guard && c.SniffMode == "rules" {
		return usagef("cannot use --sniff rules with --allow: a program could say an allowed name to any address; " +
			"use --sniff name, which has the proxy connect to the name, or leave one of them out")
	}
	return nil
}

// Sniff returns the settings of --sniff, or nil if no connection is held for its name.
func (c *Config) Sniff() *route.Sniff {
	if c.SniffMode == "" || c.SniffMode == "off" {
		return nil
	}
	return &route.Sniff{Ports: c.SniffPorts, Wait: c.SniffWait, Names: c.SniffMode == "name"}
}
