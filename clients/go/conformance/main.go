// Command conformance is the agent of the Go client in the conformance suite of all clients: it does what it is told on standard input
// with the client's normal means and says on standard output what came of it. tests/clients/conformance/README.md in the repository has
// the protocol. It never retries, waits for a state, or compares.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	virtfleet "virtfleet.dev/go"
)

const lineLimit = 4 << 20

// request is one line of standard input. A field that it does not have is refused.
type request struct {
	ID                int64   `json:"id"`
	Do                string  `json:"do"`
	As                string  `json:"as"`
	Address           string  `json:"address"`
	CAFile            string  `json:"ca_file"`
	CertFile          string  `json:"cert_file"`
	KeyFile           string  `json:"key_file"`
	Parent            string  `json:"parent"`
	DomainID          string  `json:"domain_id"`
	Name              string  `json:"name"`
	UID               string  `json:"uid"`
	Node              string  `json:"node"`
	DisplayName       string  `json:"display_name"`
	Etag              string  `json:"etag"`
	Operation         string  `json:"operation"`
	Epoch             string  `json:"epoch"`
	Text              string  `json:"text"`
	UploadID          string  `json:"upload_id"`
	Start             bool    `json:"start"`
	Resnapshot        bool    `json:"resnapshot"`
	Force             *bool   `json:"force"`
	PageSize          int32   `json:"page_size"`
	Seed              uint32  `json:"seed"`
	Offset            int64   `json:"offset"`
	OffsetBytes       int64   `json:"offset_bytes"`
	SizeBytes         int64   `json:"size_bytes"`
	PowerButtonDelayS float64 `json:"power_button_delay_s"`
	TimeoutS          float64 `json:"timeout_s"`
	DeadlineS         float64 `json:"deadline_s"`
}

type failure struct {
	Code     string            `json:"code"`
	Reason   string            `json:"reason"`
	Message  string            `json:"message"`
	Metadata map[string]string `json:"metadata"`
	NewName  string            `json:"new_name"`
	Fields   []string          `json:"fields"`
}

type answer struct {
	ID     int64    `json:"id"`
	Result any      `json:"result,omitempty"`
	Error  *failure `json:"error,omitempty"`
}

// empty is the result of what has nothing to tell.
type empty struct{}

var errUnknownStep = errors.New("unknown step")

// failureOf returns an error as the protocol has it.
func failureOf(err error) *failure {
	var typed *virtfleet.Error
	switch {
	case errors.Is(err, errUnknownStep):
		return &failure{Code: "UNKNOWN_STEP", Message: err.Error()}
	case errors.Is(err, context.DeadlineExceeded):
		// A wait that ran out of time, whatever stood in its way last.
		return &failure{Code: "DEADLINE_EXCEEDED", Message: err.Error()}
	case errors.As(err, &typed):
		told := &failure{
			Code: codeName(typed.Code), Reason: string(typed.Reason), Message: typed.Message, Metadata: typed.Metadata,
			NewName: typed.NewName, Fields: []string{},
		}
		for _, field := range typed.Fields {
			told.Fields = append(told.Fields, field.Path)
		}
		return told
	}
	return &failure{Code: "UNTYPED", Message: fmt.Sprintf("%T: %v", err, err)}
}

// codeName returns DEADLINE_EXCEEDED for DeadlineExceeded.
func codeName(code codes.Code) string {
	if code == codes.Canceled {
		return "CANCELLED"
	}
	var name strings.Builder
	for index, letter := range code.String() {
		if index > 0 && letter >= 'A' && letter <= 'Z' {
			name.WriteByte('_')
		}
		name.WriteRune(letter)
	}
	return strings.ToUpper(name.String())
}

func seconds(number float64) time.Duration { return time.Duration(number * float64(time.Second)) }

func decode(line []byte) (*request, error) {
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.DisallowUnknownFields()
	asked := &request{}
	if err := decoder.Decode(asked); err != nil {
		// Its id may be readable all the same.
		_ = json.Unmarshal(line, asked)
		return asked, fmt.Errorf("%w: %w", errUnknownStep, err)
	}
	return asked, nil
}

func main() {
	agent := newAgent()
	var output sync.Mutex
	say := func(told answer) {
		text, err := json.Marshal(told)
		if err != nil {
			text, _ = json.Marshal(answer{ID: told.ID, Error: failureOf(err)})
		}
		output.Lock()
		defer output.Unlock()
		_, _ = os.Stdout.Write(append(text, '\n'))
	}
	lines := bufio.NewReaderSize(os.Stdin, lineLimit)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			asked, refused := decode(line)
			go func() {
				if refused != nil {
					say(answer{ID: asked.ID, Error: failureOf(refused)})
					return
				}
				result, err := agent.do(asked)
				if err != nil {
					say(answer{ID: asked.ID, Error: failureOf(err)})
					return
				}
				say(answer{ID: asked.ID, Result: result})
			}()
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				fmt.Fprintln(os.Stderr, err)
			}
			break
		}
	}
	if _, err := agent.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}
