//go:build fleet

package fleettest

import (
	"io"
	"net"
	"net/url"
	"os"
	"testing"

	virtfleet "virtfleet.dev/go"
	commonv1 "virtfleet.dev/go/common/v1"
	"virtfleet.dev/go/virtfleettest"
)

// TestMain lets the test program be the command that joins its standard input and output to a port.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "relay" {
		conn, err := net.Dial("tcp", os.Args[2])
		if err != nil {
			os.Exit(1)
		}
		go func() { _, _ = io.Copy(conn, os.Stdin); _ = conn.(*net.TCPConn).CloseWrite() }()
		_, _ = io.Copy(os.Stdout, conn)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// The helper is the real one: `virtfleet proxy`, or what VIRTFLEET_COMMAND names.
func TestAnyCommandIsATransport(t *testing.T) {
	fleet := virtfleettest.Start(t)
	arguments := url.Values{"arg": {"relay", fleet.Address}, "server_name": {"127.0.0.1"}}
	client := fleet.Dial(t, virtfleet.WithAddress("command:"+os.Args[0]+"?"+arguments.Encode()), virtfleet.WithCredentials(
		virtfleet.Credentials{CAFile: fleet.CAFile, CertFile: fleet.CertFile, KeyFile: fleet.KeyFile},
	))
	answer, err := client.Access.WhoAmI(t.Context(), &commonv1.WhoAmIRequest{})
	if err != nil || answer.GetTransport() != "tls" {
		t.Fatal(answer, err)
	}
	fleet.CutConnections(t)
	until(t, "it is connected again, through another process", func() bool {
		_, err := client.Access.WhoAmI(t.Context(), &commonv1.WhoAmIRequest{})
		return err == nil
	})
}
